"""The failure of a conversion."""


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; names the file, the tensor and the remedy."""
