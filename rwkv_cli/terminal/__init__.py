"""The things that a person sees and types: output, progress, input lines, settings, plots."""
