//! A [`Picture`] as SVG: lanes from left to right, steps from top to bottom, each in rows of its own, so that nothing
//! can lie upon another. It has a background of its own: it is read on light pages and on dark ones.
//!
//! All lengths are in pixels.

use std::fmt::{self, Write as _};

use super::picture::{Address, Picture, Step};

/// Width of ten characters of the (monospaced) font at its size: that of the widest common one, and a little more.
const TEN_CHARACTERS: usize = 74;
/// Height of a line of text.
const LINE: usize = 17;
/// Between the border of a box and what is in it, and between boxes.
const SPACE: usize = 8;
/// Around everything.
const MARGIN: usize = 16;

const STYLE: &str = "\
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2328; }
.quiet { fill: #59636e; }
.strong { font-weight: bold; }
.new { font-weight: bold; fill: #bc4c00; }
.middle { text-anchor: middle; }
.life { stroke: #b0b8c1; stroke-dasharray: 2 4; }
.way { stroke: #1f2328; stroke-width: 1.5; marker-end: url(#head); }
.rule { stroke: #d1d9e0; }
.page { fill: #ffffff; stroke: #d1d9e0; }
.lane { fill: #f6f8fa; stroke: #8c959f; }
.hook { fill: #ddf4ff; stroke: #0969da; }";

/// Draws it.
pub(super) fn draw(picture: &Picture) -> String {
    let mut sheet = Sheet::new(picture);
    sheet.heads(picture);
    for step in &picture.steps {
        match step {
            Step::Part(name) => sheet.part(name),
            Step::Send { from, to, src, dst, remark } => sheet.send((*from, *to), (src, dst), remark),
            Step::Hook { at, name, lines } => sheet.hook(*at, name, lines),
        }
    }
    sheet.end(&picture.title)
}

/// What is drawn so far.
struct Sheet {
    /// Middle of each lane.
    lanes: Vec<usize>,
    width: usize,
    /// Where the next step begins.
    y: usize,
    body: String,
}

impl Sheet {
    fn new(picture: &Picture) -> Self {
        let heads: Vec<_> = picture.lanes.iter().map(|lane| head_width(&lane.who, &lane.what)).collect();
        // Neighbours are so far apart that their heads and what is sent between them have room.
        let mut gaps: Vec<_> = heads.windows(2).map(|pair| pair[0].midpoint(pair[1]) + 2 * SPACE).collect();
        for step in &picture.steps {
            if let Step::Send { from, to, src, dst, remark } = step {
                let (first, last) = (*from.min(to), *from.max(to));
                let texts = [from_text(src), to_text(dst), remark.clone()];
                let needed = texts.iter().map(|text| width_of(text)).max().unwrap_or(0) + 4 * SPACE;
                let each = needed.div_ceil(last - first);
                gaps[first..last].iter_mut().for_each(|gap| *gap = each.max(*gap));
            }
        }
        let mut lanes = vec![MARGIN + heads[0] / 2];
        for gap in gaps {
            lanes.push(lanes[lanes.len() - 1] + gap);
        }
        let right = lanes[lanes.len() - 1] + heads[heads.len() - 1] / 2;
        let widest = picture.steps.iter().map(|step| match step {
            Step::Hook { name, lines, .. } => hook_width(name, lines),
            Step::Part(_) | Step::Send { .. } => 0,
        });
        let width = right.max(MARGIN + widest.max().unwrap_or(0)) + MARGIN;
        Self { lanes, width, y: MARGIN, body: String::new() }
    }

    fn heads(&mut self, picture: &Picture) {
        let height = 2 * LINE + 2 * SPACE;
        for (lane, x) in picture.lanes.iter().zip(self.lanes.clone()) {
            let width = head_width(&lane.who, &lane.what);
            self.rect("lane", x - width / 2, width, height);
            self.text("middle strong", x, self.y + SPACE + LINE - 5, &lane.who);
            self.text("middle quiet", x, self.y + SPACE + 2 * LINE - 5, &lane.what);
        }
        self.y += height + SPACE;
    }

    fn part(&mut self, name: &str) {
        let begin = 2 * MARGIN + width_of(name);
        self.y += LINE;
        self.text("quiet strong", MARGIN, self.y, name);
        self.line("rule", (begin, self.width - MARGIN), self.y - 4);
        self.y += SPACE;
    }

    fn send(&mut self, (from, to): (usize, usize), (src, dst): (&Address, &Address), remark: &str) {
        let (from, to) = (self.lanes[from], self.lanes[to]);
        let middle = from.midpoint(to);
        self.y += LINE;
        self.text(class(src), middle, self.y, &from_text(src));
        self.y += 6;
        self.line("way", (from, to), self.y);
        self.y += LINE - 3;
        self.text(class(dst), middle, self.y, &to_text(dst));
        if !remark.is_empty() {
            self.y += LINE;
            self.text("middle quiet", middle, self.y, remark);
        }
        self.y += SPACE;
    }

    fn hook(&mut self, at: usize, name: &str, lines: &[String]) {
        let width = hook_width(name, lines);
        let height = (lines.len() + 1) * LINE + 2 * SPACE;
        let x = self.lanes[at].saturating_sub(width / 2).clamp(MARGIN, self.width - MARGIN - width);
        self.rect("hook", x, width, height);
        self.text("strong", x + SPACE, self.y + SPACE + LINE - 5, name);
        for (row, line) in lines.iter().enumerate() {
            self.text("", x + SPACE, self.y + SPACE + (row + 2) * LINE - 5, line);
        }
        self.y += height + SPACE;
    }

    /// All of it. Writing to a string does not fail.
    fn end(self, title: &str) -> String {
        let (width, height) = (self.width, self.y + MARGIN);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\">\n<title>{}</title>\n<style>\n{STYLE}\n</style>\n\
             <defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" \
             markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0 8 4 0 8z\" fill=\"#1f2328\"/></marker></defs>\n\
             <rect class=\"page\" x=\"1\" y=\"1\" width=\"{}\" height=\"{}\" rx=\"8\"/>\n",
            Escaped(title),
            width - 2,
            height - 2,
        );
        for x in &self.lanes {
            let (top, bottom) = (MARGIN + 2 * LINE + 2 * SPACE, height - MARGIN);
            let _ =
                writeln!(svg, "<line class=\"life\" x1=\"{x}\" y1=\"{top}\" x2=\"{x}\" y2=\"{bottom}\"/>");
        }
        svg + &self.body + "</svg>\n"
    }

    /// A box that begins where the next step does.
    fn rect(&mut self, class: &str, x: usize, width: usize, height: usize) {
        let y = self.y;
        self.put(format_args!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"4\"/>"
        ));
    }

    fn line(&mut self, class: &str, (from, to): (usize, usize), y: usize) {
        self.put(format_args!("<line class=\"{class}\" x1=\"{from}\" y1=\"{y}\" x2=\"{to}\" y2=\"{y}\"/>"));
    }

    fn text(&mut self, class: &str, x: usize, y: usize, text: &str) {
        self.put(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" xml:space=\"preserve\">{}</text>",
            Escaped(text)
        ));
    }

    fn put(&mut self, element: fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }
}

fn width_of(text: &str) -> usize {
    (text.chars().count() * TEN_CHARACTERS).div_ceil(10)
}

fn head_width(who: &str, what: &str) -> usize {
    width_of(who).max(width_of(what)) + 2 * SPACE
}

fn hook_width(name: &str, lines: &[String]) -> usize {
    lines.iter().map(|line| width_of(line)).fold(width_of(name), usize::max) + 2 * SPACE
}

fn from_text(src: &Address) -> String {
    format!("from {}", src.text)
}

fn to_text(dst: &Address) -> String {
    format!("to {}", dst.text)
}

const fn class(address: &Address) -> &'static str {
    if address.is_new { "middle new" } else { "middle" }
}

/// Text between tags.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            c => f.write_char(c),
        })
    }
}
