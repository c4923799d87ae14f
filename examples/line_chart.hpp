// A picture of curves as SVG, which any browser shows.
#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

namespace chart {

struct Curve {
  std::string name;                               ///< in the legend
  std::vector<std::pair<double, double>> points;  ///< (x, y)
  std::string color = "#2171b5";
  std::string dashes = "none";  ///< or the lengths of dashes and gaps: "6 3"
  double width = 1.6;
};

struct LineChart {
  std::string title, x_label, y_label;
  std::vector<Curve> curves;
  bool is_logarithmic = false;  ///< the y axis; points that are not positive are left out then
};

namespace detail {

inline constexpr double kWidth = 920, kHeight = 520, kLeft = 80, kRight = 690, kTop = 50, kBottom = 460;

/// Values from `least` to `most`, drawn from one pixel to another.
struct Axis {
  double first_pixel, last_pixel;
  double least = std::numeric_limits<double>::infinity(), most = -least;

  void include(double value) {
    least = std::min(least, value);
    most = std::max(most, value);
  }
  void widen() {
    if (!(least <= most)) least = 0, most = 1;
    if (least == most) least -= 0.5, most += 0.5;
  }
  double operator()(double value) const {
    return first_pixel + (value - least) / (most - least) * (last_pixel - first_pixel);
  }
};

inline std::string text(double x, double y, const std::string& anchor, const std::string& content,
                        const std::string& more = "") {
  std::string escaped;
  for (const char c : content) escaped += c == '<' ? "&lt;" : c == '&' ? "&amp;" : std::string(1, c);
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" {}>{}</text>\n", x, y, anchor, more, escaped);
}

inline std::string line(double x1, double y1, double x2, double y2, const std::string& stroke) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" {}/>\n", x1, y1, x2, y2, stroke);
}

inline std::string stroke_of(const Curve& curve) {
  return fmt::format("stroke=\"{}\" stroke-width=\"{}\" stroke-dasharray=\"{}\"", curve.color, curve.width,
                     curve.dashes);
}

/// Round numbers, some five of them, on an axis.
inline std::vector<double> ticks(const Axis& axis) {
  const auto rough = (axis.most - axis.least) / 5, power = std::pow(10, std::floor(std::log10(rough)));
  const auto step = power * (rough < 2 * power ? 2 : rough < 5 * power ? 5 : 10);
  std::vector<double> ticks;
  for (auto i = std::ceil(axis.least / step); i * step <= axis.most; ++i) ticks.push_back(i * step);
  return ticks;
}

/// 1, 2 and 5 times the powers of ten on an axis of logarithms, or only the powers where these are many.
inline std::vector<double> logarithmic_ticks(const Axis& axis) {
  std::vector<double> ticks;
  for (auto power = std::floor(axis.least); power <= axis.most; ++power) {
    for (const double digit : {1, 2, 5}) {
      const auto tick = power + std::log10(digit);
      const bool is_left_out = digit > 1 && axis.most - axis.least > 3;
      if (tick >= axis.least && tick <= axis.most && !is_left_out) ticks.push_back(tick);
    }
  }
  return ticks;
}

/// The chart's curves with points that can be drawn, y as it is measured on the axis.
inline std::vector<Curve> drawable(const LineChart& chart) {
  auto curves = chart.curves;
  for (auto& curve : curves) {
    auto& points = curve.points;
    for (auto& point : points) point.second = chart.is_logarithmic ? std::log10(point.second) : point.second;
    const auto is_not = [](const auto& point) { return !std::isfinite(point.second); };
    points.erase(std::remove_if(points.begin(), points.end(), is_not), points.end());
  }
  return curves;
}

inline std::string frame(const LineChart& chart, const Axis& x, const Axis& y) {
  const std::string grid = "stroke=\"#dddddd\"", bold = "font-weight=\"bold\"";
  auto svg = text(kLeft, kTop - 20, "start", chart.title, bold);
  for (const auto tick : ticks(x)) {
    svg += line(x(tick), kTop, x(tick), kBottom, grid);
    svg += text(x(tick), kBottom + 18, "middle", fmt::format("{:g}", tick));
  }
  for (const auto tick : chart.is_logarithmic ? logarithmic_ticks(y) : ticks(y)) {
    svg += line(kLeft, y(tick), kRight, y(tick), grid);
    const auto value = chart.is_logarithmic ? std::pow(10, tick) : tick;
    svg += text(kLeft - 8, y(tick) + 4, "end", fmt::format("{:.4g}", value));
  }
  svg += text((kLeft + kRight) / 2, kBottom + 42, "middle", chart.x_label);
  const auto middle = (kTop + kBottom) / 2;
  return svg + text(20, middle, "middle", chart.y_label, fmt::format("transform=\"rotate(-90 20 {:.1f})\"", middle));
}

inline std::string polyline(const Curve& curve, const Axis& x, const Axis& y) {
  std::string points;
  for (const auto& point : curve.points) points += fmt::format("{:.1f},{:.1f} ", x(point.first), y(point.second));
  return fmt::format("<polyline points=\"{}\" fill=\"none\" {}/>\n", points, stroke_of(curve));
}

}  // namespace detail

/// The chart as the text of an SVG picture.
inline std::string svg(const LineChart& chart) {
  using namespace detail;
  const auto curves = drawable(chart);
  Axis x{kLeft, kRight}, y{kBottom, kTop};
  for (const auto& curve : curves) {
    for (const auto& point : curve.points) x.include(point.first), y.include(point.second);
  }
  x.widen(), y.widen();
  auto svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
      kWidth, kHeight);
  svg += frame(chart, x, y);
  double legend = kTop + 5;
  for (const auto& curve : curves) {
    svg += polyline(curve, x, y);
    svg += line(kRight + 15, legend, kRight + 50, legend, stroke_of(curve));
    svg += text(kRight + 58, legend + 4, "start", curve.name);
    legend += 20;
  }
  return svg + "</svg>\n";
}

/// Writes the picture. Throws std::runtime_error where that is impossible.
inline void write(const LineChart& chart, const std::filesystem::path& file) {
  std::ofstream stream(file);
  stream << svg(chart);
  if (!stream.flush()) throw std::runtime_error(file.string() + ": cannot be written");
}

}  // namespace chart
