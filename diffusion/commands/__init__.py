"""Holds what the programs share and the library never imports: flags, options as text, files, sweeps and plots."""
