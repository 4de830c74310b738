"""python -m rwkv_cli"""

from rwkv_cli.main import main

main()
