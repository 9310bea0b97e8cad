"""Tests of the jobs as programs."""
