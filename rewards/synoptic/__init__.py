"""Synoptic reports: protocols, reading and writing reports, checks and scores."""

import frugalpath.rewards.synoptic.reward
