//! One table, or one JSON object, in place of a screen.

use anyhow::Result;
use serde::Serialize;

use super::model::{Model, Rates, Row};
use crate::inspect::UsageView;
use crate::show::To;
use crate::table::Table;

/// `-o json`.
#[derive(Serialize)]
struct Top<'a> {
    /// The time between both counts, seconds.
    seconds: f64,
    /// Of all Services that were asked for.
    total: Rates,
    services: Vec<ServiceTop<'a>>,
}

/// A Service, or the host ports of a Pod.
#[derive(Serialize)]
struct ServiceTop<'a> {
    service: u32,
    owner: Option<&'a str>,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
    /// Per second; `null`: it came meanwhile.
    rates: Option<Rates>,
    /// Since it has this number.
    usage: UsageView,
}

impl<'a> From<&'a Row> for ServiceTop<'a> {
    fn from(row: &'a Row) -> Self {
        let label = row.label();
        Self {
            service: row.service,
            owner: label.map(|label| label.owner),
            namespace: label.map(|label| label.namespace.as_str()),
            name: label.map(|label| label.name.as_str()),
            rates: row.rates,
            usage: row.totals(),
        }
    }
}

/// Prints it.
pub fn print(to: &mut To<'_>, model: &Model, seconds: f64) -> Result<()> {
    let rows = model.rows();
    if to.json {
        let services = rows.into_iter().map(ServiceTop::from).collect();
        return to.json(&Top { seconds, total: model.total(), services });
    }
    Ok(table(&rows, to.wide).print(&mut to.out)?)
}

fn table(rows: &[&Row], is_wide: bool) -> Table {
    let rate = |row: &Row, of: fn(&Rates) -> f64| {
        row.rates.as_ref().map_or_else(|| "-".to_owned(), |rates| format!("{:.1}", of(rates)))
    };
    let four = |row: &Row| {
        [
            rate(row, |rates| rates.packets),
            rate(row, |rates| rates.bytes),
            rate(row, |rates| rates.connections),
            rate(row, |rates| rates.drops),
        ]
    };
    if !is_wide {
        let mut table = Table::new(["SERVICE", "PACKETS/S", "BYTES/S", "CONNECTIONS/S", "DROPS/S"]);
        for row in rows {
            let [packets, bytes, connections, drops] = four(row);
            table.row([row.name.clone(), packets, bytes, connections, drops]);
        }
        return table;
    }
    let mut table = Table::new([
        "SERVICE",
        "NUMBER",
        "PACKETS/S",
        "BYTES/S",
        "CONNECTIONS/S",
        "DROPS/S",
        "PACKETS",
        "BYTES",
        "CONNECTIONS",
        "DROPS",
    ]);
    for row in rows {
        let ([packets, bytes, connections, drops], totals) = (four(row), row.totals());
        table.row([
            row.name.clone(),
            row.service.to_string(),
            packets,
            bytes,
            connections,
            drops,
            totals.packets.to_string(),
            totals.bytes.to_string(),
            totals.connections.to_string(),
            totals.refused.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::model::tests::three;
    use super::*;

    fn printed(json: bool, wide: bool) -> String {
        let mut out = vec![];
        let mut to = To { bpffs: Path::new(""), json, wide, out: &mut out };
        print(&mut to, &three(), 2.0).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn tables_and_json_stay_as_they_are() {
        assert_eq!(
            printed(false, false),
            "\
SERVICE  PACKETS/S  BYTES/S    CONNECTIONS/S  DROPS/S
shop/a   1000.0     1500.0     2.0            0.0
shop/b   10.0       4500000.0  3.0            0.0
shop/c   0.0        0.0        0.0            25.0
"
        );
        assert!(printed(false, true).contains(
            "shop/b   2       10.0       4500000.0  3.0            0.0      20       9000000  6            0"
        ));
        let json: serde_json::Value = serde_json::from_str(&printed(true, false)).unwrap();
        crate::show::tests::assert_documented(&json);
        assert_eq!(json["seconds"], 2.0);
        assert_eq!(json["total"]["drops"], 25.0);
        assert_eq!(
            json["services"][0],
            serde_json::json!({
                "service": 1, "owner": "Service", "namespace": "shop", "name": "a",
                "rates": { "packets": 1000.0, "bytes": 1500.0, "connections": 2.0, "drops": 0.0 },
                "usage": { "connections": 4, "packets": 2000, "bytes": 3000, "refused": 0 },
            })
        );
    }
}
