//! Pictures of what was measured: bars for the variants of each situation.

use std::fmt::Write as _;

use super::report::{AXES, number};
use super::results::{FLOOR, Series};

const WIDTH: f64 = 900.0;
/// Where bars begin: left of it stands what they are.
const LEFT: f64 = 330.0;
/// Where the longest ends: right of it stands its number.
const RIGHT: f64 = 820.0;
const ROW: f64 = 18.0;
const TOP: f64 = 40.0;
/// Colours that can be told apart by most eyes (Okabe and Ito).
const COLORS: [&str; 8] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];

/// A picture of the series of one unit; `None`: there is nothing to see.
pub fn bars(title: &str, series: &[&Series]) -> Option<String> {
    let bars: Vec<_> = series
        .iter()
        .filter(|series| series.variant != FLOOR)
        .filter_map(|series| Some((*series, series.summary()?)))
        .collect();
    let most = bars.iter().map(|(_, summary)| summary.upper).reduce(f64::max).filter(|most| *most > 0.0)?;
    let mut variants: Vec<&str> = Vec::new();
    for (series, _) in &bars {
        if !variants.contains(&series.variant.as_str()) {
            variants.push(&series.variant);
        }
    }
    let mut rows = 0.0;
    let mut body = String::new();
    let scale = |value: f64| LEFT + value.max(0.0) / most * (RIGHT - LEFT);
    for (series, summary) in &bars {
        let y = TOP + rows * ROW;
        let middle = y + ROW / 2.0;
        let color = variants.iter().position(|variant| *variant == series.variant).unwrap_or(0);
        let color = COLORS[color % COLORS.len()];
        let (lower, median, upper) = (scale(summary.lower), scale(summary.median), scale(summary.upper));
        let _ = write!(
            body,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{color}\"/>\n\
             <path d=\"M{lower:.1} {middle:.1}H{upper:.1}\" stroke=\"black\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            LEFT - 6.0,
            middle + 4.0,
            escape(&label(series)),
            y + 3.0,
            median - LEFT,
            ROW - 6.0,
            upper.max(median) + 5.0,
            middle + 4.0,
            number(summary.median),
        );
        rows += 1.0;
    }
    let unit = bars.first().map_or("", |(series, _)| series.unit.as_str());
    let height = TOP + rows * ROW + 10.0;
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">{} ({})</text>\n{body}</svg>\n",
        escape(title),
        escape(unit),
    ))
}

fn label(series: &Series) -> String {
    let axes = AXES.map(|axis| (axis, series.axis(axis)));
    let mut words = vec![series.what.clone(), series.variant.clone()];
    words.extend(axes.into_iter().filter(|(_, value)| !value.is_empty()).map(|(axis, value)| match axis {
        "family" | "way" => value.to_owned(),
        _ => format!("{value} {axis}"),
    }));
    words.join(", ")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(variant: &str, samples: &[f64]) -> Series {
        Series {
            group: "packet".to_owned(),
            what: "a<b".to_owned(),
            variant: variant.to_owned(),
            unit: "ns".to_owned(),
            axes: [("flows".to_owned(), "1".to_owned())].into(),
            samples: samples.to_vec(),
        }
    }

    #[test]
    fn a_bar_is_as_long_as_its_median() {
        let all = [series("one", &[50.0]), series("two", &[100.0]), series(FLOOR, &[1000.0])];
        let svg = bars("packets", &all.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(svg.matches("<rect x=").count(), 2, "{svg}");
        assert!(svg.contains("width=\"245.0\"") && svg.contains("width=\"490.0\""), "{svg}");
        assert!(svg.contains("a&lt;b, one, 1 flows") && !svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn nothing_measured_is_no_picture() {
        assert_eq!(bars("packets", &[&series("one", &[])]), None);
        assert_eq!(bars("packets", &[&series("one", &[0.0])]), None);
    }
}
