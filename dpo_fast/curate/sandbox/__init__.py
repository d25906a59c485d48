"""Programs that are hostile until shown otherwise.

processes  children that can be ended with all that they started
output     what they print, up to a limit
"""
