"""What the server does: hand out the adapter, average what comes back, save the last one."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from lora_app.task import make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    arrays = ArrayRecord(get_peft_model_state_dict(make_model()))
    fraction = float(context.run_config["fraction-train"])
    strategy = FedAvg(fraction_train=fraction, fraction_evaluate=0.0)
    result = strategy.start(grid, arrays, num_rounds=int(context.run_config["num-rounds"]))
    save_file(result.arrays.to_torch_state_dict(), str(context.run_config["save-to"]))
