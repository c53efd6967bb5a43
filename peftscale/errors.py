"""The error tree: one class for each thing that can be wrong with what the user gave us.

Every message says where, what, what was expected and what to do. The command line turns each of these
into one message on standard error and exit code 2; anything else that is raised is a failed run, exit
code 1. All of them survive pickling, so that a worker's error reaches the driver with its class.
"""


class PeftscaleError(Exception):
    """Root of the tree. Never raised itself."""


class ConfigError(PeftscaleError):
    """The run file, an override or a command-line argument is wrong."""


class DataError(PeftscaleError):
    """The data set cannot be used as the task describes it."""


class ModelError(PeftscaleError):
    """The base cannot be read, or has parts that we do not shard or quantise."""


class AdapterError(PeftscaleError):
    """An adapter directory is damaged, belongs to another base, or does not fit."""


class CheckpointError(PeftscaleError):
    """No checkpoint of the run can be used, or it cannot be written."""


class ClusterError(PeftscaleError):
    """The cluster cannot give what the run asks for."""


class TrainingError(Exception):
    """The run itself failed (for example too many non-finite steps in a row). Exit code 1."""
