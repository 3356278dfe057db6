"""What a validation found: typed rows, histograms, and the page that shows them. Start with report.py."""
