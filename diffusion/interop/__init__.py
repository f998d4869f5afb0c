"""Reads and writes the files of other people's projects."""
