"""An NVIDIA GPU as a device. Importing this package needs nothing of CUDA; its modules do."""
