"""The Lightning side: module, callbacks, precision."""
