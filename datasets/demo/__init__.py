"""The embedded benchmark: plan, edits, build."""
