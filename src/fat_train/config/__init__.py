"""From yaml and command line to typed, checked dataclasses."""
