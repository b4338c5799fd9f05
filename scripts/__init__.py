"""The command-line programs. Arguments and printing live here; everything else is in the package `sd`."""
