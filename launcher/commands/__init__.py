"""The commands of `ps-accordion`, one module each, loaded when they are called."""
