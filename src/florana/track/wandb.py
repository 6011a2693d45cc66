"""Weights & Biases, offline unless WANDB_MODE says otherwise: `wandb sync` sends the folder when its owner wants."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb


class WandbTracker:
    """A run of W&B in its own folder, without the machine's data, git, packages, code and console.

    Args:
        store: where all runs of one tracker lie; not needed here.
        own: the run's folder.
        run: the run's name.
        settings: the recipe.
        last: the last round that is logged already; not needed here.
        known: what `keeps` gave then.
    """

    def __init__(
        self, store: Path, own: Path, run: str, settings: Mapping[str, Any], last: int, known: Mapping[str, str]
    ) -> None:
        del store, last
        self._id = known.get("run_id") or secrets.token_hex(8)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "florana",
            name=run,
            id=self._id,
            dir=str(own),
            mode=os.environ.get("WANDB_MODE") or "offline",
            resume="allow" if known else None,
            reinit="create_new",  # the runs of a study are open side by side
            config=dict(settings),
            settings=wandb.Settings(
                host="-",  # else the machine's name is found
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def keeps(self) -> Mapping[str, str]:
        """The run's name, by which W&B puts the parts of a resumed run together."""
        return {"run_id": self._id}

    def log(self, round_: int, figures: Mapping[str, float]) -> None:
        """A round's figures, at once."""
        self._run.log({"round": round_, **figures}, step=round_)

    def finish(self) -> None:
        """Close the run's file."""
        self._run.finish()
