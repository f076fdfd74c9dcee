//! The screen, from [`super::model`] alone.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Sparkline, Table, TableState};

use super::model::{Model, Rates, Row, Sort, View};

/// Columns that take part only where there is room for them.
const ROOM_FOR_SPARKLINES: u16 = 90;
/// Width of a column of numbers.
const NUMBER: u16 = 9;
const SPARKLINE: u16 = 24;

/// Rows of Services, or of backends, that fit.
pub fn page(area: Rect) -> usize {
    usize::from(area.height.saturating_sub(3))
}

/// Draws all of it, as far as there is room.
pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let rows = Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]);
    let [head, body, foot] = rows.areas(frame.area());
    frame.render_widget(headline(model), head);
    match model.view() {
        View::Services => services(frame, body, model),
        View::Backends(_) => backends(frame, body, model),
    }
    frame.render_widget(help(model), foot);
}

fn headline(model: &Model) -> Paragraph<'_> {
    let total = model.total();
    let mut spans = vec![Span::styled("fairlead top", Style::new().add_modifier(Modifier::BOLD))];
    if let Some(row) = model.looked_into() {
        spans.push(format!("  backends of {}", row.name).into());
    }
    // Before the numbers, so that whoever types sees it in a narrow window, too.
    if model.typing || !model.filter().is_empty() {
        spans.push(format!("  /{}{}", model.filter(), if model.typing { "_" } else { "" }).into());
    }
    spans.push(Span::raw(format!(
        "  {} packets/s  {}B/s  {} connections/s  {} drops/s  by {}",
        short(total.packets),
        short(total.bytes),
        short(total.connections),
        short(total.drops),
        model.sort.name()
    )));
    Paragraph::new(Line::from(spans))
}

fn help(model: &Model) -> Paragraph<'_> {
    let text = match (&model.trouble, model.view()) {
        (Some(trouble), _) => trouble.clone(),
        (None, _) if model.typing => "type a part of the name  Enter keep  Esc clear".into(),
        (None, View::Services) => "q quit  / filter  Enter backends  s sort (p b c d n)  arrows move".into(),
        (None, View::Backends(_)) => "q quit  Esc back".into(),
    };
    Paragraph::new(Line::styled(text, Style::new().add_modifier(Modifier::DIM)))
}

fn services(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let rows = model.rows();
    let with_sparklines = area.width >= ROOM_FOR_SPARKLINES;
    let chosen = model.chosen(&rows);
    let mut state = TableState::default().with_selected((!rows.is_empty()).then_some(chosen));
    let numbers = [Sort::Packets, Sort::Bytes, Sort::Connections, Sort::Drops];
    let titles =
        ["PACKETS/S", "BYTES/S", "CONN/S", "DROPS/S"].into_iter().zip(numbers).map(|(title, sort)| {
            let style = if sort == model.sort {
                Style::new().add_modifier(Modifier::UNDERLINED)
            } else {
                Style::new()
            };
            Cell::from(Line::from(format!("{title:>9}")).style(style))
        });
    let header = std::iter::once(Cell::from("SERVICE")).chain(titles);
    let mut widths = vec![Constraint::Min(8)];
    widths.extend([Constraint::Length(NUMBER); 4]);
    let [area, graphs] = if with_sparklines {
        Layout::horizontal([Constraint::Min(0), Constraint::Length(SPARKLINE + 1)]).areas(area)
    } else {
        [area, Rect::ZERO]
    };
    let table = Table::new(rows.iter().map(|row| service_row(row)), widths)
        .header(TableRow::new(header).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut state);
    if with_sparklines {
        sparklines(frame, graphs, rows.get(state.offset()..).unwrap_or_default());
    }
}

fn service_row(row: &Row) -> TableRow<'_> {
    let number = |of: fn(&Rates) -> f64| {
        let text = row.rates.as_ref().map_or_else(|| "-".to_owned(), |rates| short(of(rates)));
        Cell::from(format!("{text:>9}"))
    };
    TableRow::new([
        Cell::from(row.name.as_str()),
        number(|rates| rates.packets),
        number(|rates| rates.bytes),
        number(|rates| rates.connections),
        number(|rates| rates.drops),
    ])
}

/// Packets per second of the last minutes, beside the rows.
fn sparklines(frame: &mut Frame<'_>, area: Rect, rows: &[&Row]) {
    for (row, y) in rows.iter().zip(area.y + 1..area.bottom()) {
        let line = Rect { x: area.x + 1, y, width: SPARKLINE.min(area.width.saturating_sub(1)), height: 1 };
        let newest = row.history.len().saturating_sub(usize::from(line.width));
        let data: Vec<u64> = row.history.iter().skip(newest).copied().collect();
        frame.render_widget(Sparkline::default().data(data), line);
    }
}

fn backends(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let header = ["BACKEND", "STATE", "PENDING", "ESTABLISHED", "CLOSING", "CLOSED"];
    let rows = model.backends().iter().map(|backend| {
        TableRow::new([
            backend.address.clone(),
            backend.state.to_owned(),
            backend.pending.to_string(),
            backend.established.to_string(),
            backend.closing.to_string(),
            backend.closed.to_string(),
        ])
    });
    let widths = [
        Constraint::Min(12),
        Constraint::Length(11),
        Constraint::Length(NUMBER),
        Constraint::Length(11),
        Constraint::Length(NUMBER),
        Constraint::Length(NUMBER),
    ];
    let table = Table::new(rows, widths)
        .header(TableRow::new(header).style(Style::new().add_modifier(Modifier::BOLD)));
    frame.render_widget(table, area);
}

/// A rate in at most six characters.
fn short(rate: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut value = rate;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = usize::from(value < 99.95 && (unit > 0 || value.fract() != 0.0));
    format!("{value:.digits$}{}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::{sample, three, usage};
    use super::super::model::{BackendFlows, Key};
    use super::*;

    fn screen(model: &Model, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned() + "\n").collect()
    }

    #[test]
    fn services_with_rates_and_sparklines() {
        assert_eq!(
            screen(&three(), 100, 7),
            "\
fairlead top  1.0k packets/s  4.5MB/s  5 connections/s  25 drops/s  by packets
SERVICE                             PACKETS/S   BYTES/S    CONN/S   DROPS/S
shop/a                                   1.0k      1.5k         2         0 █
shop/b                                     10      4.5M         3         0 █
shop/c                                      0         0         0        25

q quit  / filter  Enter backends  s sort (p b c d n)  arrows move
"
        );
    }

    #[test]
    fn the_filter_and_what_is_wrong_are_shown() {
        let mut model = three();
        model.press(Key::Char('/'), 5);
        model.press(Key::Char('b'), 5);
        let text = screen(&model, 80, 6);
        assert!(text.contains("/b_") && text.contains("shop/b") && !text.contains("shop/a"), "{text}");
        assert!(text.contains("Esc clear"), "{text}");
        model.trouble = Some("the maps are gone".into());
        assert!(screen(&model, 80, 6).ends_with("the maps are gone\n"));
    }

    #[test]
    fn backends_of_a_service() {
        let mut model = three();
        model.press(Key::Enter, 5);
        let backend = BackendFlows {
            address: "10.0.0.1:8080".into(),
            state: "active",
            pending: 1,
            established: 22,
            closing: 3,
            closed: 4,
        };
        model.take_backends(1, vec![backend]);
        assert_eq!(
            screen(&model, 80, 4),
            "\
fairlead top  backends of shop/a  1.0k packets/s  4.5MB/s  5 connections/s  25 d
BACKEND                    STATE       PENDING   ESTABLISHED CLOSING   CLOSED
10.0.0.1:8080              active      1         22          3         4
q quit  Esc back
"
        );
    }

    #[test]
    fn long_lists_scroll_to_what_is_marked() {
        let mut model = Model::new(Sort::Name, String::new());
        let names: Vec<String> = (0..50).map(|n| format!("s{n:02}")).collect();
        let rows: Vec<_> = (1..).zip(&names).map(|(n, name)| (n, name.as_str(), usage(0, 0, 0, 0))).collect();
        model.take(sample(1, &rows));
        model.press(Key::End, 5);
        let text = screen(&model, 100, 8);
        assert!(text.contains("shop/s49") && !text.contains("shop/s00"), "{text}");
    }

    #[test]
    fn any_size_of_terminal_is_drawn() {
        let mut model = three();
        for view in [Key::Escape, Key::Enter] {
            model.press(view, 1);
            for (width, height) in [(0, 0), (1, 1), (1, 9), (9, 1), (10, 2), (20, 3), (300, 100)] {
                let _ = screen(&model, width, height);
            }
        }
        let tiny = screen(&three(), 30, 4);
        assert!(tiny.lines().nth(2).unwrap().starts_with("shop/a"), "{tiny}");
        assert_eq!((page(Rect::new(0, 0, 10, 2)), page(Rect::new(0, 0, 10, 24))), (0, 21));
    }

    #[test]
    fn rates_are_short() {
        let texts = [0.0, 0.5, 7.0, 99.96, 100.4, 999.0, 999.6, 1500.0, 123_456.0, 4.5e6, 9.9e15].map(short);
        assert_eq!(texts, ["0", "0.5", "7", "100", "100", "999", "1.0k", "1.5k", "123k", "4.5M", "9900T"]);
    }
}
