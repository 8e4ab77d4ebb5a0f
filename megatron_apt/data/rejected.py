"""What is wrong with an input file. Apart from the decoders, so that readers of shards need none."""

from pathlib import Path


class RejectedInput(ValueError):
    """An input file that cannot become a sample.

    Attributes:
        file, field, value, remedy: what is wrong with which file, and what to do about it.
    """

    def __init__(self, file: str | Path, field: str, value: object, remedy: str):
        super().__init__(f"{file}: {field}={value}: {remedy}")
        self.file, self.field, self.value, self.remedy = str(file), field, value, remedy

    def as_dict(self) -> dict:
        return {"file": self.file, "field": self.field, "value": self.value, "remedy": self.remedy}
