"""What a person sees and types: output, progress, input lines, plots."""
