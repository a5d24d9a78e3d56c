"""Reporting: results as tables and plots."""
