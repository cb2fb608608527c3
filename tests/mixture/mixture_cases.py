"""A base of a tokenizer alone, and the mixture stage on a recipe as the tests call it."""

from types import SimpleNamespace

from merit.mixture import stage


def as_base(tokenizer, images=None):
    """What the stage reads of a base; a real base is handed through."""
    if hasattr(tokenizer, "tokenizer"):
        return tokenizer
    return SimpleNamespace(tokenizer=tokenizer, images=images)


def prepare_mixture(recipe, base, folder, progress=None):
    """The stage on a recipe, with a base or just a tokenizer."""
    return stage.prepare_mixture(recipe, as_base(base), folder, progress)
