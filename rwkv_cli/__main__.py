"""The command line as `python -m rwkv_cli`."""

from rwkv_cli.main import main

main()
