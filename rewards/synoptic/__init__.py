"""Synoptic reports: protocols, reading and writing reports, checks and scores."""

from frugalpath.rewards.synoptic import reward as reward
