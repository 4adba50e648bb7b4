"""Fitted allocators that decide the budgets of cases: a file for each form."""
