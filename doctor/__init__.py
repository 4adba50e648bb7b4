"""`frugalpath doctor`: check the machine and a recipe's needs, and estimate its memory and step time."""
