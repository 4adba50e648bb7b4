"""The report of a run: one page without a network, the summary, the model card, the console."""
