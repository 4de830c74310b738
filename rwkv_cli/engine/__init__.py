"""What the commands do, for any caller: no Click, no printing, no terminal."""
