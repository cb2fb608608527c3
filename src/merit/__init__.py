"""MERIT: measure gradient conflict, split the mixture, train branches apart, merge once.

The public API is loaded lazily, so that ``import merit`` costs milliseconds and no ML library.
"""

__version__ = "0.1.0"
