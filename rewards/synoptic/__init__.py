"""Synoptic reports: protocols, reading and writing reports, checks and scores."""

import rewards.synoptic.reward  # noqa: F401  # registers the rewards, as the other files of `rewards` do on import
