"""MLflow's store in a file of the run folder, by MLflow's own client."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # else it tells of each table that it makes

EXPERIMENT = "florana"
AT_ONCE = 100
"""Parameters that one call may have."""


class MlflowTracker:
    """A run in the store; the client names no user, and sees nothing of the environment.

    Args:
        store: the folder of the store, for all runs of a study.
        own: the run's folder; not needed here.
        run: the run's name.
        settings: the recipe.
        last: the last round that is logged already; 0 for none.
        known: what `keeps` gave then.
    """

    def __init__(
        self, store: Path, own: Path, run: str, settings: Mapping[str, Any], last: int, known: Mapping[str, str]
    ) -> None:
        del own
        self._client = MlflowClient(f"sqlite:///{(store / 'mlflow.db').resolve()}")
        self._logged = last
        if "run_id" in known:
            self._run = known["run_id"]
            # a round that was written, but not noted as such before a kill
            history = self._client.get_metric_history(self._run, "bytes/up")
            self._logged = max([last, *(int(one.step) for one in history)])
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(EXPERIMENT)
        place = (store / "artifacts").resolve().as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT, place)
        self._run = str(self._client.create_run(experiment, run_name=run).info.run_id)
        params = [Param(name, str(value)) for name, value in settings.items()]
        for start in range(0, len(params), AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + AT_ONCE])

    def keeps(self) -> Mapping[str, str]:
        """The run's name in the store."""
        return {"run_id": self._run}

    def log(self, round_: int, figures: Mapping[str, float]) -> None:
        """A round's figures, at once."""
        if round_ <= self._logged:
            return
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, round_) for name, value in figures.items()])

    def finish(self) -> None:
        """Say that the run is not written to any more."""
        self._client.set_terminated(self._run)
