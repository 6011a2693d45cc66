"""What a site does with a message: train the adapter it was sent, send it back."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lora_app.task import load_data, make_model, train

app = ClientApp()


@app.train()
def train_adapter(message: Message, context: Context) -> Message:
    """A round of local training."""
    model = make_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    rows = load_data(int(context.node_config["partition-id"]))
    loss = train(model, rows, int(context.run_config["local-steps"]), float(context.run_config["learning-rate"]))
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
