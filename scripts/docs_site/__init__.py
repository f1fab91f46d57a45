"""The documentation as a site: reference pages made from the code, Sphinx's settings, the check of all links."""
