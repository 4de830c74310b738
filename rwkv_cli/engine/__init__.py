"""The work behind the commands, for any caller: no Click, no printing, no terminal."""
