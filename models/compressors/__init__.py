"""From the patches of a slide to a budget of visual tokens: a file for each way."""
