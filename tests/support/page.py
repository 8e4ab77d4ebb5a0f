"""A page of HTML as a browser finds it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects references, pictures, text, and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "path", "use", "input", "rect", "line", "circle"})

    def __init__(self, html: str):
        super().__init__()
        self.references, self.images, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.references += [
            attrs[name] for name in ("src", "href", "xlink:href", "srcset") if attrs.get(name)
        ]
        if tag == "img":
            self.images.append(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
