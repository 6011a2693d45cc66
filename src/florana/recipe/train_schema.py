"""The recipe's [train]: how a client trains in one round."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from florana.recipe.data_schema import Section


class Engine(Section):
    """How the clients of a simulation share this machine; a federation over the network does not look here."""

    workers: int = Field(1, ge=1, le=1024)
    """Processes that train clients side by side, each with one thread, over one copy of the base model: the same bytes
    as with `threads = 1` and one process. On processors, and on systems that can fork."""
    cohort: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = 1
    """Clients that go through the model in one pass, each with its own factors, head and optimizer: the same adapters
    within rounding, not to the bit. "auto": 16 on a GPU, 1 on a processor, where it gains only with many small clients.
    Fewer from there on, said in one line, where memory runs short."""

    def require(self, train: Train, checkpointing: bool) -> None:
        """Raise ValueError where clients cannot train together as the rest of the recipe has it.

        Args:
            train: the recipe's section.
            checkpointing: whether the model gives up its activations.
        """
        if self.cohort == 1:
            return
        reasons = {
            "engine.workers above 1: a client goes one way or the other": self.workers > 1,
            f"train.optimizer = '{train.optimizer}', whose steps look at whole tensors": train.optimizer
            in ("adafactor", "adamw-8bit"),
            "train.neftune_noise_alpha, whose noise is as wide as the batch is long": train.neftune_noise_alpha
            is not None,
            "model.gradient_checkpointing: lower engine.cohort instead": checkpointing,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"engine.cohort = {self.cohort} does not go with {reason}")


class Train(Section):
    """A client's local training in one round."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the client's rows."""
    batch_size: int = Field(16, ge=1)
    """Rows that go through the model at once; with gradient accumulation, so many times as many make a step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the optimizer, which begins anew in each round; the most that a schedule reaches."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, as in AdamW; of sgd it is added to the gradient."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    optimizer: Literal["adamw", "sgd", "adafactor", "adamw-8bit"] = "adamw"
    """torch's AdamW and SGD, Transformers' Adafactor (without relative steps), and AdamW with 8-bit moments
    (bitsandbytes, a CUDA device)."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Of sgd, 0.9 where not given; it begins anew in each round."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls, to 0; Transformers' curves."""
    lr_schedule_over: Literal["run", "round"] = "run"
    """run: over all rounds, by the round's number, whether a client was asked in all or not; round: anew in each."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """The share of the schedule's steps in which the rate rises: the t-th of w such steps has t / w of it."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches per optimizer step: the gradient is that of one batch of all their rows, with less memory."""
    autocast: Literal["none", "bfloat16"] = "none"
    """bfloat16: matrix products of forward passes in half precision, beside float32 adapters."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The share of each target spread over all classes or tokens (torch's cross entropy); not in the loss reported."""
    proximal_mu: float = Field(0.0, ge=0)
    """FedProx (arXiv 1812.06127): mu / 2 times the squared distance of what is trained from what was received."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """LoRA+ (arXiv 2402.12354): B's learning rate in those of A; heads have A's."""
    packing: bool = False
    """causal-lm: short rows laid end to end, up to `data.max_length` tokens, without seeing one another; `batch_size`
    and the steps of an epoch then count such bins. Weights go on counting rows."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune (arXiv 2310.05914): uniform noise on the embeddings in training, alpha / sqrt(tokens x width) wide."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.momentum is not None and self.optimizer != "sgd":
            raise ValueError(f"train.momentum is of train.optimizer = 'sgd', and it is '{self.optimizer}'")
        return self
