"""How integers are chosen, one method a module."""
