"""What a machine has, what a recipe needs, whether it fits, and how long a step takes: `python -m frugalpath.doctor`."""
