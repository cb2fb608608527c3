"""A base of a tokenizer alone, and the mixture's functions on a whole recipe, as the tests call them."""

from types import SimpleNamespace

from merit.mixture import find_datasets, image_check
from merit.mixture.stage import encode_mixture


def as_base(tokenizer, images=None):
    """What the stage reads of a base; a real base is handed through."""
    if hasattr(tokenizer, "tokenizer"):
        return tokenizer
    return SimpleNamespace(tokenizer=tokenizer, images=images)


def find(recipe):
    return find_datasets(recipe.mixture, recipe.evaluate)


def discover(mixture):
    return list(find_datasets(mixture).sources)


def check_sources(recipe, rows=8):
    return find(recipe).check(rows)


def source_fingerprints(recipe, memo=None):
    return find(recipe).fingerprints(memo)


def check_images(recipe, *progress, sight=None):
    return image_check.check_images(find(recipe), *progress, sight=sight)


def encode(recipe, base, folder, *progress):
    settings = dict(zip(["progress"], progress, strict=False))
    length, seed = recipe.train.max_length, recipe.seed
    return encode_mixture(find(recipe), as_base(base), folder, max_length=length, seed=seed, **settings)


def prepare_mixture(recipe, base, folder, *progress):
    """The stage on a recipe, with a base or just a tokenizer; what it counted of every dataset."""
    return list(encode(recipe, base, folder, *progress).counts)
