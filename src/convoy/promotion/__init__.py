"""Promotion: when a version may become the champion, and how it does."""
