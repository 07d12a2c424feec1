"""Errors whose message is for the user: one line that says what cannot be used and how to mend it."""


class UserError(ValueError):
    """Something that the user gave cannot be used; commands print the message without a traceback."""


class ConfigError(UserError):
    """A config file, an override or a value in it."""


class DataError(UserError):
    """A data file, a column or a row."""


class CheckpointError(UserError):
    """A checkpoint could not be written or belongs to another run."""


class SickTrainingError(UserError):
    """A loss or gradient is NaN or infinite."""
