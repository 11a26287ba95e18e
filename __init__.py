"""distill: turn slow diffusion models into few-step ones."""

__version__ = "0.1.0"
