"""convoy: from labelled images to a registered champion."""
