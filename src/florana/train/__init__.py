"""What a client does with Transformers and PEFT: tasks, data, partitions, training, evaluation."""

import os

# Set before any hub client is imported: florana sends no usage data, and neither does what it loads.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
