"""Networks that look at image and question and value or choose budgets."""
