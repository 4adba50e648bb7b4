"""How an allocator learns budgets: from rollouts, from score tables, by escalation, by text."""
