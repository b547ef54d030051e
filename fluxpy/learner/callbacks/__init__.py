"""The callbacks in the box."""
