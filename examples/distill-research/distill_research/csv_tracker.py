"""Figures of a run as a table that any spreadsheet opens."""

import csv

import distill
from pydantic import Field


class CSV(distill.Tracker):
    """Writes one line for each figure: step, name, value."""

    name = "csv"

    class Config(distill.Tracker.Config):
        """Settings of the table."""

        file: str = Field("figures.csv", min_length=1)
        """Name of the file in the output folder."""

    def start(self, run):
        path = run.output_dir / self.config.file
        kept = self._until(path, run.resumed_step)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._table = csv.writer(self._file)
        self._table.writerow(["step", "name", "value"])
        self._table.writerows(kept)
        self._step = run.resumed_step

    @staticmethod
    def _until(path, step):
        """Lines of an earlier session up to `step`, that of its checkpoint: what came later is done again."""
        if not step or not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [line for line in list(csv.reader(file))[1:] if int(line[0]) <= step]

    def log(self, metrics, step):
        self._table.writerows([step, name, value] for name, value in metrics.items())
        self._file.flush()
        self._step = step

    def finish(self, scores=None):
        self.log(scores or {}, self._step)
        self._file.close()


@distill.hookimpl
def register_trackers():
    return [CSV]
