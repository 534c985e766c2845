"""Errors that a user can cause; the command line prints their text alone and exits with 1."""


class NeuronMiniMaxError(Exception):
    """Base of all errors with a message meant for the user: the thing, what was found and expected,
    the next step.
    """


class ConfigError(NeuronMiniMaxError):
    """A config.json that is missing, broken, or describes another architecture."""


class CheckpointError(NeuronMiniMaxError):
    """A checkpoint whose files or tensors are not what its config.json implies."""


class ConversionError(NeuronMiniMaxError):
    """A conversion that cannot go on, or a converted directory that is not what it claims to be."""


class ScaleConventionError(CheckpointError, ConversionError):
    """A checkpoint whose scales do not show what they mean, until the user says it."""


class BackendError(NeuronMiniMaxError):
    """A compiled model that cannot be made, loaded or asked for what was requested."""


class GenerationError(NeuronMiniMaxError):
    """A prompt, sampling option or tokenizer that cannot be used."""


class TrainingError(NeuronMiniMaxError):
    """Training data, options or a saved training state that cannot be used."""
